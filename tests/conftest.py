"""How hypothesis draws: the same examples in every run of CI, new ones on a developer's machine.

No test has a time limit of its own: how fast a machine is says nothing of what is tested.
"""

import os

from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", derandomize=True, print_blob=True, deadline=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None)  # make fuzz
settings.load_profile("ci" if os.environ.get("CI") else "local")
