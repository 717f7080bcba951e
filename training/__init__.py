"""Demonstrations, pretraining, the six objectives and the finetuning loop; run from the checkout."""
