"""How the demo model is made: the corpus, the training and the questions that score it."""
