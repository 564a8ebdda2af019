"""Names for clusters, from words that set their captions apart."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction import text

_MAX_WORDS = 4
# A further word of a name needs at least this share of the first word's score.
_MIN_SHARE = 0.7
# The most frequent words that are scored; it bounds the memory.
_MAX_VOCABULARY = 50_000


def from_captions(
  captions: Mapping[int, Sequence[str]],
) -> dict[int, str]:
  """Names clusters by class-based TF-IDF, as BERTopic names topics.

  The captions of a cluster count as one text (arXiv 2203.05794). A word counts
  once per caption, so that no single long caption names a cluster. A word that
  all clusters have, such as an article, names none.

  Args:
    captions: the captions of the images of every cluster, '' for none.

  Returns:
    The names by cluster: up to four words, the one with the highest score
    first. Clusters without captions have no name.
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
  if len(clusters) > 1:
    # scikit-learn adds 1 to the logarithm, which is 0 for a word of all.
    scores = scores.multiply(1 - 1 / words.idf_).tocsr()
  vocabulary = words.get_feature_names_out()
  named = {}
  for row, cluster in enumerate(clusters):
    values, ids = (
      part[scores.indptr[row] : scores.indptr[row + 1]]
      for part in (scores.data, scores.indices)
    )
    order = np.lexsort((ids, -values))[:_MAX_WORDS]
    least = max(_MIN_SHARE * values.max(initial=0), 1e-9)
    telling = order[values[order] >= least]
    if len(telling):
      named[cluster] = ' '.join(vocabulary[ids[telling]])
  return named


_split = text.TfidfVectorizer(token_pattern=r'(?u)\b\w+\b').build_analyzer()
