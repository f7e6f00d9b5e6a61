"""Every tensor that a method may ask for by argument name: name -> (shape, meaning). Nothing else may be asked for.

Shapes: B examples, N examples of a whole set, T tokens, C classes, V vocabulary, D features, M teachers, J joints,
A anchors, ... any leading dimensions. A list in brackets runs from shallow to deep. The plain scheme adds `student_`
and `teacher_` to what the networks return, so a network returns `logits`, never `student_logits`.
"""

NAMES: dict[str, tuple[str, str]] = {
    # what the batch brings
    "inputs": ("B ...", "what the networks read: images [B, C, H, W] or token ids [B, T]"),
    "labels": ("...", "class index, or the next token"),
    "mask": ("...", "True where the element counts"),
    "index": ("B", "position of the example in the training set; as a build-time shape (N,), N the size of that set"),
    "domain": ("B", "index of the domain or client that the example comes from"),
    "weights": ("B", "weight of each example"),
    "progress": ("", "training progress in [0, 1]"),
    "negatives": ("B K", "indices of the contrasting examples"),
    # responses
    "student_logits": ("... C", "student logits"),
    "teacher_logits": ("... C", "teacher logits"),
    "teachers_logits": ("M ... C", "logits of several teachers"),
    "teacher_ids": ("... K", "class or token ids of the stored teacher entries"),
    "teacher_logprobs": ("... K", "their log-probabilities"),
    # inside
    "student_feats": ("[B D H W]", "student feature maps or token features, shallow to deep"),
    "teacher_feats": ("[B D H W]", "teacher feature maps or token features, shallow to deep"),
    "student_attn": ("[B h T T]", "student attention maps, shallow to deep"),
    "teacher_attn": ("[B h T T]", "teacher attention maps, shallow to deep"),
    "student_emb": ("B D", "student embedding, the input of its head"),
    "teacher_emb": ("B D", "teacher embedding, the input of its head"),
    "student_hidden": ("B T D", "student hidden states before the vocabulary head"),
    "teacher_hidden": ("B T D", "teacher hidden states before the vocabulary head"),
    "student_head": ("V D", "weight of the student's vocabulary head"),
    "teacher_head": ("V D", "weight of the teacher's vocabulary head"),
    "student_vocab_logits": ("B T V", "student logits over its own tokenizer's vocabulary"),
    "teacher_vocab_logits": ("B T V", "teacher logits over its own tokenizer's vocabulary"),
    # dense prediction, retrieval, cross-modal, graphs
    "student_map": ("B C H W", "student per-pixel logits"),
    "teacher_map": ("B C H W", "teacher per-pixel logits"),
    "student_cls": ("B A K", "student class logits an anchor"),
    "teacher_cls": ("B A K", "teacher class logits an anchor"),
    "student_box": ("B A 4", "student boxes"),
    "teacher_box": ("B A 4", "teacher boxes"),
    "student_heat": ("B J H W", "student heat maps"),
    "teacher_heat": ("B J H W", "teacher heat maps"),
    "foreground": ("B A", "True where the anchor covers an object"),
    "student_scores": ("B N", "student relevance of N candidates"),
    "teacher_scores": ("B N", "teacher relevance of N candidates"),
    "student_image": ("B D", "student image embedding"),
    "teacher_image": ("B D", "teacher image embedding"),
    "student_text": ("B D", "student text embedding"),
    "teacher_text": ("B D", "teacher text embedding"),
    "edges": ("2 E", "source and target node of every edge"),
    # whole sets, for selection and measures
    "features": ("N D", "feature of every example"),
    "curves": ("E N", "a per-example statistic over E epochs"),
    "student_samples": ("N D", "features of what the student generates"),
    "teacher_samples": ("N D", "features of what the teacher generates"),
    "real_samples": ("N D", "features of real examples"),
}
