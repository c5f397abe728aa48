"""A whole compression: rounds of training, then a calibration. Driven alike in a plain script and in a job."""

from __future__ import annotations

from raycomp.core.chain import Chain
from raycomp.core.evaluator import Evaluator
from raycomp.errors import CompressionError


def conduct(chain: Chain, rounds: int, max_steps: int | None = None, max_epochs: int | None = None) -> None:
    """Trains `chain`'s compressors through its evaluator, from where they are to the end, and calibrates them.

    A chain that was restored in the midst of a round goes on there. Where compressors need several rounds, a later one
    begins with fresh optimizers, and with the first weights where a compressor wants them; else it goes on.

    Args:
        chain: the fused compressors.
        rounds: how many; with 0 they decide without training.
        max_steps, max_epochs: how long a round is, unless a compressor says it (`Chain.epochs_of`); where they only
            calibrate, `max_steps` is the calibration's length, unless they say it.

    Raises:
        CompressionError: there is no evaluator, and one is needed.
    """
    if not rounds and not chain.round:
        chain.begin()
        chain.end_round()
    while chain.round < rounds:
        evaluator = _evaluator(chain)
        if chain.rounds > 1 and chain.round and not chain.steps_in_round:
            chain.rewind()
            evaluator.reset()
        epochs = chain.epochs_of(chain.round)
        evaluator.train(chain, *((max_steps, max_epochs) if epochs is None else (None, epochs)))
    if chain.calibrates and not chain.calibrated:
        length = None if chain.wants_training else max_steps
        _evaluator(chain).calibrate(chain, chain.calibration_steps or length)


def _evaluator(chain: Chain) -> Evaluator:
    if chain.evaluator is None:
        names = [type(each).__name__ for each in chain.members if each.rounds or each.calibrates]
        message = f"{', '.join(names) or 'training'} needs an evaluator"
        raise CompressionError(message, remedy="pass a TorchEvaluator")
    return chain.evaluator
