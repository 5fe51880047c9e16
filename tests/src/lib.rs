//! What the test suites of rproxy share.
