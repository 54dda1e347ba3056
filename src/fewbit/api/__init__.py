"""The verbs, one file for each file of the command line."""

# For programs that import it from here: it was public here before `fewbit` exported it.
from fewbit.texts.calibration import Calibration as Calibration
