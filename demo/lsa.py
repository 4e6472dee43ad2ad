"""The demo's teacher, `--teacher lsa`: latent semantic analysis, nothing to download."""

from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from support import fail


def fit_lsa(sentences):
    """Latent semantic analysis of a corpus: .transform(n str) -> (n, <= 32).

    TF-IDF without the most common words, which say little: those in over 3 % of the sentences and
    in over 50. Then truncated SVD with a fixed seed. Ends the program if the corpus is too small.
    """
    most_common = max(50, len(sentences) * 3 // 100)
    tfidf = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", max_df=most_common)
    weights = tfidf.fit_transform(sentences)  # (n, different words)
    dimensions = min(32, min(weights.shape) - 1)
    if dimensions < 5:
        fail(
            f"{len(sentences)} sentences with {weights.shape[1]} different words are too small a "
            "corpus for lsa; give more, or another --teacher"
        )
    svd = TruncatedSVD(dimensions, random_state=0).fit(weights)
    return make_pipeline(tfidf, svd)
