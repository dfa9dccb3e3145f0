"""Subcommands of `finetuned` beside `serve`."""
