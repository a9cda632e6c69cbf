"""The scripts in this folder need torch and TRL; they make goldens and hold no tests."""

collect_ignore_glob = ["make_*.py"]
