"""Real faults for real processes: hostile peers, proxies, disks, kills; and what measures them.

With FAULTS=all in the environment (`make faults`) everything is tried, else a part that is fast.
"""

import os

FULL = os.environ.get("FAULTS") == "all"
