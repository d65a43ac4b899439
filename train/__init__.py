"""Fine-tuning of merging LLaVAs: python -m train.run; also train.bench, .compare, .export, .embedded.

The route of a run: options, launch (processes), training_args, model (LoRA), conversation and data (rows),
collator, trainer, checkpoint (resume), evaluation, model_card.
"""
