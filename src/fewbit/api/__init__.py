"""The verbs, one file for each file of the command line."""

# Its place before the package exported it.
from fewbit.texts.calibration import Calibration as Calibration
