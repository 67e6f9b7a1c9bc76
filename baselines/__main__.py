"""`python -m baselines`: see `baselines/__init__.py`."""

import scales
from baselines import main

scales.run(main)
