"""The offline harness: what is measured about the rooms below. Nothing imports this room."""
