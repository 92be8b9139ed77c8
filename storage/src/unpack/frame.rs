//! The framing of image layers in one stream, for whoever reads an OCI layout to write.
//!
//! An OCI layout is a folder of blobs; its reader sends only the layers, lowest first, as one stream:
//!
//! ```text
//!  "EPLAYER1"                            8 bytes
//!  repeated, lowest layer first:
//!    header length    u32, little endian, 1 to 4096
//!    header           JSON: {"media_type": "...", "length": N, "digest": "sha256:...", "diff_id": "sha256:..."}
//!    blob             `length` bytes, as in the layout
//!  0                  u32: the end; a stream without it was cut
//! ```
//!
//! `media_type`, `length` (the descriptor's `size`) and `digest` are those of the layer's descriptor in the manifest;
//! `diff_id` is the same-numbered `rootfs.diff_ids` of the image configuration. Both digests are verified here, so the
//! reader need not hash. Layers may be plain, gzip or zstd tars, named as by OCI or by Docker.

use std::io::{self, Read};

use serde::{Deserialize, Serialize};

use super::UnpackError;

pub const MAGIC: &[u8; 8] = b"EPLAYER1";
/// Longest layer header, in bytes.
pub const HEADER_BYTES_MAX: u32 = 4096;
/// Most layers in one image; Docker's own bound is 127.
pub const LAYERS_MAX: u32 = 512;

/// One layer's header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerHeader {
    pub media_type: String,
    /// Bytes of the blob.
    pub length: u64,
    /// Of the blob: `sha256:` and 64 lower-case hexadecimal digits.
    pub digest: String,
    /// Of the uncompressed tar.
    pub diff_id: String,
}

/// How a layer's blob is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl LayerHeader {
    pub(super) fn compression(&self) -> Result<Compression, UnpackError> {
        match self.media_type.as_str() {
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => {
                Ok(Compression::None)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip" => Ok(Compression::Gzip),
            "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(Compression::Zstd),
            other => {
                let what = format!("layers of the type {}", super::names::shown(other.as_bytes()));
                Err(UnpackError::Unsupported { what })
            }
        }
    }
}

/// The next layer's header, `None` at the end of the stream.
pub(super) fn read_header(input: &mut impl Read, layer: u32) -> Result<Option<LayerHeader>, UnpackError> {
    let mut length = [0; 4];
    read_all(input, &mut length, layer)?;
    let length = u32::from_le_bytes(length);
    if length == 0 {
        return Ok(None);
    }
    if length > HEADER_BYTES_MAX || layer > LAYERS_MAX {
        return Err(UnpackError::Malformed { what: format!("frame of layer {layer}") });
    }
    let mut header = vec![0; length as usize];
    read_all(input, &mut header, layer)?;
    let header = serde_json::from_slice(&header)
        .map_err(|e| UnpackError::Malformed { what: format!("header of layer {layer}: {e}") })?;
    Ok(Some(header))
}

fn read_all(input: &mut impl Read, buf: &mut [u8], layer: u32) -> Result<(), UnpackError> {
    input.read_exact(buf).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => UnpackError::Truncated { at: format!("the frame of layer {layer}") },
        _ => UnpackError::Io { op: "read", name: None, source },
    })
}
