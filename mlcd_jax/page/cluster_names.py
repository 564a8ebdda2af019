"""Names for clusters: the words of their captions that others do not have."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction import text

_MAX_WORDS = 4
_MIN_SHARE = 0.7  # Of the first word's score, that the others must have.
_MAX_VOCABULARY = 50_000


def from_captions(
  captions: Mapping[int, Sequence[str]],
) -> dict[int, str]:
  """Names clusters by class-based TF-IDF, a cluster's captions as one text.

  As BERTopic (arXiv 2203.05794) names topics. Words count once a caption, so
  that one long caption does not name a cluster.

  Args:
    captions: cluster -> captions of its images, '' where there is none.

  Returns:
    cluster -> up to four words, the most telling first; clusters without
    captions are left out.
  """
  clusters = [c for c, texts in captions.items() if any(texts)]
  words = text.TfidfVectorizer(
    analyzer=lambda texts: [w for t in texts for w in sorted(set(_split(t)))],
    max_features=_MAX_VOCABULARY,
    norm=None,
  )
  try:
    scores = words.fit_transform([captions[c] for c in clusters])
  except ValueError:  # No caption, or not a word in any.
    return {}
  vocabulary = words.get_feature_names_out()
  named = {}
  for row, cluster in enumerate(clusters):
    values, ids = (
      part[scores.indptr[row] : scores.indptr[row + 1]]
      for part in (scores.data, scores.indices)
    )
    order = np.lexsort((ids, -values))[:_MAX_WORDS]
    telling = order[values[order] >= _MIN_SHARE * values.max(initial=0)]
    if len(telling):
      named[cluster] = ' '.join(vocabulary[ids[telling]])
  return named


_split = text.TfidfVectorizer(token_pattern=r'(?u)\b\w+\b').build_analyzer()
