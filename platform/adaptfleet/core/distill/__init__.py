"""Knowledge distillation: the divergences, where the teacher's distributions come from, and the objective made of both.

`objective.KnowledgeDistillation` is one more objective of the training loop; it needs nothing but two models.
"""
