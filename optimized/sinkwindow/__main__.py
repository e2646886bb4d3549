"""`python -m sinkwindow`: the command line, which is the lab's."""

import runpy

runpy.run_module("sinkwindow_lab", run_name="__main__", alter_sys=True)
