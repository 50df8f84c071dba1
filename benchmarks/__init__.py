"""What chiffon costs, each measurement one command; see README.md."""
