"""`mpidl doctor` where rank 1 meets a file system that does not answer."""

import os
import sys
import time

from mpidl.cli import main
from mpidl.doctor import examination
from mpidl.runtime import launched_rank

examination.ANSWER_LIMIT_S = 2.0
if launched_rank() == 1:
    os.statvfs = lambda path: time.sleep(60)  # type: ignore[return-value]
sys.exit(main(["doctor"]))
