"""Files as others write them and as we write them: JSON, tensors, GPT-2 folders, data, downloads.

Imports nothing of ours from outside this folder.
"""
