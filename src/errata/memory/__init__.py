"""The edit memory: the edits that act at inference, found for each query.

encoder.py   texts -> unit vectors, by a sentence encoder from a folder, or by hashed n-grams without weights
index.py     unit vectors -> the nearest ones: compared exactly up to 50,000, by a graph above; its file
vectors.py   the vectors of texts, kept by encoder and text
records.py   records in a ledger: add, supersede, retract, undo; contradictions are found when they are written
store.py     EditMemory: records, vectors and index as one memory that can be searched
shared.py    the same on Postgres with pgvector, for several servers
scope.py     whether what was found concerns the query: a verifier that is trained and calibrated, with a bound on false fires
reader.py    who reads a record before answering: a twin of the model, with other weights in some places
activations.py   the module's output with something else in it, where a row is concerned
route.py     where a memory answers in the model's place, in a batch, with a cache, in the middle of a text
live.py      a memory that is kept elsewhere, asked for each question
"""
