"""The files of a run's output folder: their names, who writes which, and which are published."""

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
CARD_NAME = "README.md"
REPORT_NAME = "report.json"
PREDICTIONS_NAME = "predictions.parquet"
PAGE_NAME = "report.html"
EXAMPLES_NAME = "examples.parquet"
EVALUATION_NAME = "EVALUATION.md"
EVAL_RESULTS = ".eval_results"
FIGURES = "figures"
TRAIN_CONFIG_NAME = "train_config.yaml"
LOG_NAME = "metrics.jsonl"
BEST_NAME = "checkpoint-best"
PARTIAL_RESULTS = "evaluation-progress"
LOADING_NAME = "LOADING.md"
"""Beside the weights of a network that timm cannot build: how they are loaded."""

_RESULTS = (REPORT_NAME, PREDICTIONS_NAME, PAGE_NAME, EXAMPLES_NAME, FIGURES, EVAL_RESULTS)
_MODEL = (WEIGHTS_NAME, CONFIG_NAME, "rgb", CARD_NAME, "image.png")
_TRAINING_ALONE = (TRAIN_CONFIG_NAME, LOG_NAME, "logs", BEST_NAME, PARTIAL_RESULTS, LOADING_NAME)
OWNED_BY_EVALUATION = (*_RESULTS, EVALUATION_NAME)
OWNED_BY_CALIBRATION = (*_RESULTS, *_MODEL)
OWNED_BY_TRAINING = (*_RESULTS, *_MODEL, *_TRAINING_ALONE)
"""Names that a training run writes into its output folder besides numbered checkpoints."""
LOADED_BY_TIMM = (WEIGHTS_NAME, CONFIG_NAME)
_IMAGES, _EVAL_RESULTS = f"{FIGURES}/*.png", f"{EVAL_RESULTS}/*.yaml"
_RUN = (CARD_NAME, REPORT_NAME, PREDICTIONS_NAME, PAGE_NAME, TRAIN_CONFIG_NAME, LOG_NAME, "image.png")
PUBLISHED_RUN = (*LOADED_BY_TIMM, *_RUN, *(f"rgb/{name}" for name in LOADED_BY_TIMM), _IMAGES, _EVAL_RESULTS)
"""Published files of a run's folder. Checkpoints, which hold optimizer state as pickles, stay local."""
PUBLISHED_EVALUATION = (REPORT_NAME, EVALUATION_NAME, _IMAGES, _EVAL_RESULTS)
