"""The report's templates, and what they are filled with."""
