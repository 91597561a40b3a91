"""What the fork server imports once, so that the processes it forks start at once. Nothing is computed here: threads
that a computation starts would not survive the fork.
"""

# transformers imports a model's code when it is first asked for; one family brings nearly all of what it needs.
import transformers.models.llama.modeling_llama as llama

import moesaic.bench.point as point

__all__ = ["llama", "point"]
