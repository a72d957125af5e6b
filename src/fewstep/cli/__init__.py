"""The command line: one small file per command, no logic that belongs in a room, heavy imports inside the commands."""
