"""Python imports this module at its start in every process of `fewbit run`: it activates fewbit."""

import sys
from pathlib import Path

_own = sys.modules.pop(__name__, None)
_here = str(Path(__file__).parent)
sys.path[:] = [folder for folder in sys.path if folder != _here]
try:
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401  # the own one of the environment
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":
        raise
finally:
    if _own is not None:
        sys.modules.setdefault(__name__, _own)
try:
    import fewbit  # noqa: F401
except ImportError as error:
    sys.stderr.write(f"note: fewbit run: {sys.executable} cannot import fewbit ({error}), so it is not active there\n")
