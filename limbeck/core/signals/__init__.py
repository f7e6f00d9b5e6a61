"""The teacher-signal store for language: what a teacher says at every place of documents of any length.

- kinds: what is kept (sampled, topk, full, hidden, embedding)
- keys: documents, and the hashes that tell teachers, tokenizers, templates and texts apart
- draws: draws that depend on (seed, document, place) alone
- coding: ids and counts in few bits, read back without a loop over tokens
- files: records that are appended whole or not at all
- sources: whoever can be asked, a network or a server (adapters.remote)
- writing: capture of what is missing, in the same bytes whether or not it was killed
- reading: random access by document and place, whatever the order, batch size, packing or rank
- feeding: training batches with the signals of their places
- fidelity: what was lost, and where the bytes go
"""
