"""The training runner: `python -m finetuned_runner RUN_DIR`, one process per run. The only package with torch."""
