"""What a question gets where nothing else is said; imports nothing heavy, for the command line."""

from stripedrag.rag.packing import Policy

MODEL = "stripedhyena-smol-135m"
CONTEXT_TOKENS = 2048
ANSWER_TOKENS = 128
QUESTION_TOKENS = 64  # kept for a question where a context is made before it is asked
SHARED = 4 / 5  # of a context, where what is read is kept; measured: docs/LOG.md
POLICY: Policy = "best-last"  # measured: docs/LOG.md
