"""The embedded world: facts, corpus, small models trained on them, and tasks. No network, no hub.

world.py   facts and phrasings       corpus.py  documents         train.py  tokenizer and models
tasks.py   cases with their judges   card.py    what a lab model knows, measured         freeze.py  makes world.json
scope.py   the four tasks of the edit memory on this world
canonical.py  the six tasks of canonical examples on this world          models/    the committed weights
"""
