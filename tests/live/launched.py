"""What test_team launches in the place of trainers: processes that end as their ranks are told, or wait.

launch(2, "tests.live.launched", ["SIGKILL", "SIGTERM"])
"""

import os
import signal
import sys
import time

if __name__ == "__main__":
    told = sys.argv[1:][int(os.environ["RANK"])]
    if told.isdecimal():
        sys.exit(int(told))
    if told != "waits":
        os.kill(os.getpid(), signal.Signals[told])
    time.sleep(60)
