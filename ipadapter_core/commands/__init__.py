"""The command ``ipadapter``: one file per subcommand."""
