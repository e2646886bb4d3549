"""`python -m sinkwindow_lab.evaluation`: the command line of lm-eval, which knows the model `sinkwindow` as well."""

from sinkwindow_lab.errors import require

if __name__ == "__main__":
    require("sinkwindow_lab.evaluation.model")  # registers the model
    require("lm_eval.__main__").cli_evaluate()
