"""The edit memory: the edits that act at inference, found for each query.

encoder.py   texts -> unit vectors, by a sentence encoder from a folder, or by hashed n-grams without weights
index.py     unit vectors -> the nearest ones: compared exactly up to 50,000, by a graph above; its file
scope.py     whether a record that was found concerns the query: a verifier, trained and calibrated
vectors.py   the vectors of texts, kept by encoder and text
records.py   records in a ledger: add, supersede, retract, undo; contradictions are found when they are written
store.py     EditMemory: records, vectors and index as one memory that can be searched
shared.py    the same on Postgres with pgvector, for several servers

A hit of the store is the nearest record, not the right one: that is for the scope to say, and the store does not ask it.
"""
