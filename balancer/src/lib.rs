//! An io_uring TCP and HTTP balancer that can hold a request.
