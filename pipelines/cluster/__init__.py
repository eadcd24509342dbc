"""Ray and Ray Train: a session, its workers, and what is seen of them."""
