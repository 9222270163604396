# A cell for notebooks/colab.ipynb and notebooks/kaggle_tpu.ipynb: put it after the one that installs. The run's checkpoints
# are then in a bucket of Google Cloud instead of the session's disk. `os` and `run` are the notebook's.
# ruff: noqa: F821
#
# Costs: what the bucket holds, and every GB that a session downloads from it (page "Cloud Storage pricing"): 1.5 GB, the
#   newest checkpoint, each time that the run resumes.
# Resumes: run all cells again, in any session, on either host.
BUCKET = "gs://YOUR-BUCKET/gpt2"

if "COLAB_RELEASE_TAG" in os.environ:
    from google.colab import auth

    auth.authenticate_user()  # asks once per session
elif "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    # "Add-ons > Secrets": the JSON key of a service account that may write to the bucket, under the name GCS_KEY.
    from kaggle_secrets import UserSecretsClient

    os.environ["GOOGLE_APPLICATION_CREDENTIALS"] = "/tmp/gcs-key.json"
    with open(os.open("/tmp/gcs-key.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(UserSecretsClient().get_secret("GCS_KEY"))

run("pip install --quiet --editable '.[bucket]'")
# Its findings do not stop the notebook: where that runs is no choice.
run(f"python -m gpt2xla.doctor --bucket {BUCKET} || true")
CHECKPOINTS = BUCKET
