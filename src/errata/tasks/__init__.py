"""Data sets of the field, raw file -> examples and what judges them: one file for each. The user names the folder; nothing is downloaded.

canonical.py   the six tasks of model editing with canonical examples      published.py  how that paper chooses and reports, its tables
zsre.py, counterfact.py, fever.py                                          edits in their published layouts, record -> Case
scope.py       the four tasks of the edit memory: what an edit concerns and what it does not, in the published layouts
"""
