"""Run by test_prepare_to_*.py: slow_prepare_worker.py with `folder://` URLs, and leases that expire soon."""

import runpy

from data.folder_storage import FolderStorage

from gpt2xla.data.preparation import output_bucket
from gpt2xla.processes import lease

FolderStorage.register()
lease.RENEWED_EVERY, lease.EXPIRES_AFTER = 0.1, 0.3
output_bucket._PIECE_BYTES = 3000
runpy.run_path("tests/workers/slow_prepare_worker.py", run_name="__main__")
