//! From a thread that packs to the body of a request, with a few pieces between them: the archive is nowhere whole.

use std::io::{self, Write};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;

use super::PackError;
use crate::client::Body;

/// Bytes of one piece.
const PIECE_BYTES: usize = 128 << 10;
/// Pieces that wait to be sent.
const PIECES_QUEUED_MAX: usize = 8;

/// What became of the packing, once the body was sent or given up.
#[derive(Debug, Clone, Default)]
pub struct Packing {
    failed: Arc<Mutex<Option<PackError>>>,
}

impl Packing {
    /// Why it could not be packed, if that is why sending failed.
    pub fn failure(&self) -> Option<PackError> {
        self.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take()
    }
}

/// Runs `write` on a thread of its own; what it writes is the body.
pub fn body_of(write: impl FnOnce(Pieces) -> Result<(), PackError> + Send + 'static) -> (Body, Packing) {
    let (sender, receiver) = mpsc::channel(PIECES_QUEUED_MAX);
    let packing = Packing::default();
    let told = packing.clone();
    let pieces = Pieces { sender: sender.clone(), piece: BytesMut::with_capacity(PIECE_BYTES) };
    std::thread::spawn(move || {
        if let Err(error) = write(pieces) {
            let broken = io::Error::other(error.to_string());
            *told.failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
            // The request must not look whole.
            let _ = sender.blocking_send(Err(broken));
        }
    });
    (StreamBody::new(Receiver(receiver)).boxed(), packing)
}

/// The writing end.
pub struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    piece: BytesMut,
}

impl Pieces {
    fn pass(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, BytesMut::with_capacity(PIECE_BYTES)).freeze();
        self.sender.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..length]);
        if self.piece.len() == PIECE_BYTES {
            self.pass()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pass()
    }
}

struct Receiver(mpsc::Receiver<io::Result<Bytes>>);

impl Stream for Receiver {
    type Item = io::Result<Frame<Bytes>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_written_arrives_in_order() {
        let expected: Vec<u8> = (0..1_000_000u32).map(|n| (n % 251) as u8).collect();
        let bytes = expected.clone();
        let (body, packing) = body_of(move |mut pieces| {
            pieces
                .write_all(&bytes)
                .and_then(|()| pieces.flush())
                .map_err(|source| PackError::Write { source })
        });
        assert_eq!(body.collect().await.unwrap().to_bytes(), expected);
        assert!(packing.failure().is_none());
    }

    #[tokio::test]
    async fn what_could_not_be_packed_never_looks_whole() {
        let (body, packing) = body_of(|mut pieces| {
            pieces.write_all(b"half").and_then(|()| pieces.flush()).unwrap();
            Err(PackError::Changed { path: "x".into() })
        });
        assert!(body.collect().await.is_err());
        assert!(matches!(packing.failure(), Some(PackError::Changed { .. })));
    }
}
