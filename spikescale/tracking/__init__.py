"""What a run leaves behind for people: a JSONL file, an MLflow run, pictures of its curves."""
