"""What of this folder pytest leaves to Sphinx."""

collect_ignore = ["_build", "check.py", "conf.py", "ext", "jupyter_execute"]
