"""The exit codes of the commands. 0 is success, and 1 is an unexpected error or a failed cell of a comparison."""

MISTAKE = 2  # the settings, the data or the output folder need a change; nothing was overwritten
STOPPED = 75  # a signal stopped the process, and its work is saved: EX_TEMPFAIL of sysexits.h, "try again"
RANK_LOST = 76  # a rank died, stopped or made no progress
