"""Flash attention with the projection before it, as TPUs compute it, by interpreted kernels on XLA's CPU."""

import json

from conftest import run_xla, succeed


def test_within_documents_over_two_devices_as_exact_as_torchs_own_in_bf16() -> None:
    output = succeed(run_xla(program="tests/workers/flash_worker.py", CPU_NUM_DEVICES="2"))
    errors = json.loads(output.splitlines()[-1])
    assert errors.pop("bias of k") == 0, "softmax does not see it"
    assert [list(case) for case in errors.values()] == [["y", "x", "weight", "bias"], ["y", "x", "weight"]]
    for name, case in errors.items():
        for key, (ours, plain) in case.items():
            assert ours <= 1.05 * plain, f"{name}, {key}: {ours}, torch's own in bf16 {plain}"
