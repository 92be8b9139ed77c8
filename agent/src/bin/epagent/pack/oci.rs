//! An OCI layout, as a stream of the layers of one platform.
//!
//! The layout is a folder of blobs (OCI Image Layout Specification 1.0); a tar of one (`skopeo`, `docker save`) is
//! unpacked to a temporary folder first by whoever calls. The index is followed to the manifest of this machine's
//! platform, and its layers are sent in order, each behind a header with its digests, which the unpacker verifies:
//!
//! ```text
//!  "EPLAYER1", then per layer: u32 (little endian) length of the header, JSON header, blob; a u32 of 0 ends it
//! ```

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::PackError;

const MAGIC: &[u8; 8] = b"EPLAYER1";
/// The longest index, manifest or configuration.
const JSON_BYTES_MAX: u64 = 8 << 20;
/// As many as the unpacker takes.
const LAYERS_MAX: usize = 512;
/// An index may list indexes; this deep.
const DEPTH_MAX: usize = 4;

/// A layout whose layers were found.
#[derive(Debug)]
pub struct Layout {
    root: PathBuf,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    media_type: String,
    length: u64,
    digest: String,
    diff_id: String,
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// Whether the folder is a layout.
pub fn is_layout(root: &Path) -> bool {
    root.join("oci-layout").is_file() && root.join("index.json").is_file()
}

impl Layout {
    pub fn open(root: &Path) -> Result<Self, PackError> {
        let index: Index = read_json(root, Path::new("index.json"))?;
        let manifest: Manifest = find_manifest(root, &index, DEPTH_MAX)?;
        let config: Config = read_json(root, &blob_path(root, &manifest.config.digest)?)?;
        let unusable = |why: String| PackError::Layout { path: root.to_owned(), why };
        let (layers, ids) = (manifest.layers, config.rootfs.diff_ids);
        if layers.len() != ids.len() || layers.len() > LAYERS_MAX {
            let why = format!("{} layers with {} digests (at most {LAYERS_MAX})", layers.len(), ids.len());
            return Err(unusable(why));
        }
        let layers = layers.into_iter().zip(ids).map(|(layer, diff_id)| Layer {
            media_type: layer.media_type,
            length: layer.size,
            digest: layer.digest,
            diff_id,
        });
        let layout = Self { root: root.to_owned(), layers: layers.collect() };
        for layer in &layout.layers {
            layout.open_blob(layer)?;
        }
        Ok(layout)
    }

    /// Bytes of all layers as they are packed.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.length).sum()
    }

    /// The blob, of the announced length.
    fn open_blob(&self, layer: &Layer) -> Result<File, PackError> {
        let path = self.root.join(blob_path(&self.root, &layer.digest)?);
        let read = |source| PackError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(read)?;
        let found = file.metadata().map_err(read)?.len();
        if found != layer.length {
            let why = format!("the layer {} has {found} bytes in place of {}", layer.digest, layer.length);
            return Err(PackError::Layout { path: self.root.clone(), why });
        }
        Ok(file)
    }

    /// Writes the layers, lowest first.
    pub fn write(&self, mut output: impl Write) -> Result<(), PackError> {
        let written = |source| PackError::Write { source };
        output.write_all(MAGIC).map_err(written)?;
        for layer in &self.layers {
            let mut file = self.open_blob(layer)?;
            let header = serde_json::to_vec(layer).map_err(|error| written(error.into()))?;
            let length = u32::try_from(header.len()).unwrap_or(u32::MAX);
            output.write_all(&length.to_le_bytes()).map_err(written)?;
            output.write_all(&header).map_err(written)?;
            let copied = io::copy(&mut (&mut file).take(layer.length), &mut output).map_err(written)?;
            if copied != layer.length {
                return Err(PackError::Changed { path: self.root.join(&layer.digest) });
            }
        }
        output.write_all(&0u32.to_le_bytes()).and_then(|()| output.flush()).map_err(written)
    }
}

/// Follows the index to the manifest for this machine.
fn find_manifest(root: &Path, index: &Index, depth: usize) -> Result<Manifest, PackError> {
    let architecture = architecture();
    let fits = |descriptor: &&Descriptor| match &descriptor.platform {
        Some(platform) => platform.os == "linux" && platform.architecture == architecture,
        None => true,
    };
    let unusable = |why: String| PackError::Layout { path: root.to_owned(), why };
    let Some(found) = index.manifests.iter().find(fits) else {
        let have = index.manifests.iter().filter_map(|descriptor| descriptor.platform.as_ref());
        let have: Vec<String> = have.map(|p| format!("{}/{}", p.os, p.architecture)).collect();
        return Err(unusable(format!(
            "nothing in it is for linux/{architecture}; it has: {}",
            have.join(", ")
        )));
    };
    let path = blob_path(root, &found.digest)?;
    let is_index =
        found.media_type.ends_with("image.index.v1+json") || found.media_type.ends_with("list.v2+json");
    match (is_index, depth) {
        (true, 0) => Err(unusable(format!("its indexes are nested deeper than {DEPTH_MAX}"))),
        (true, _) => find_manifest(root, &read_json(root, &path)?, depth - 1),
        (false, _) => read_json(root, &path),
    }
}

/// `blobs/sha256/…`, from a digest that is nothing else.
fn blob_path(root: &Path, digest: &str) -> Result<PathBuf, PackError> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        let why = format!("{:?} is not a sha256 digest", digest.chars().take(80).collect::<String>());
        return Err(PackError::Layout { path: root.to_owned(), why });
    }
    Ok(Path::new("blobs/sha256").join(hex))
}

fn read_json<T: for<'a> Deserialize<'a>>(root: &Path, below: &Path) -> Result<T, PackError> {
    let path = root.join(below);
    let text = super::archive::read_text(&path, JSON_BYTES_MAX)
        .map_err(|source| PackError::Read { path: path.clone(), source })?;
    serde_json::from_str(&text).map_err(|error| {
        let why = format!("{}: {error}", below.display());
        PackError::Layout { path: root.to_owned(), why }
    })
}

/// As OCI, that is Go, calls it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::json;

    use super::*;

    /// A layout with the given blobs, each under an invented digest of its number.
    fn layout(architecture: &str, layers: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let digest = |number: usize| format!("sha256:{number:064x}");
        let blob = |number: usize, bytes: &[u8]| {
            let folder = dir.path().join("blobs/sha256");
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(format!("{number:064x}")), bytes).unwrap();
            json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest(number), "size": bytes.len() })
        };
        let descriptors: Vec<_> =
            layers.iter().enumerate().map(|(n, text)| blob(100 + n, text.as_bytes())).collect();
        let ids: Vec<_> = (0..layers.len()).map(|n| digest(200 + n)).collect();
        let config = blob(1, json!({ "rootfs": { "diff_ids": ids } }).to_string().as_bytes());
        let manifest = json!({ "config": config, "layers": descriptors }).to_string();
        let mut inner = blob(2, manifest.as_bytes());
        inner["mediaType"] = json!("application/vnd.oci.image.manifest.v1+json");
        inner["platform"] = json!({ "os": "linux", "architecture": architecture });
        let mut nested = blob(3, json!({ "manifests": [inner] }).to_string().as_bytes());
        nested["mediaType"] = json!("application/vnd.oci.image.index.v1+json");
        fs::write(dir.path().join("index.json"), json!({ "manifests": [nested] }).to_string()).unwrap();
        fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        dir
    }

    #[test]
    fn layers_are_framed_as_the_unpacker_reads_them() {
        let dir = layout(architecture(), &["lower", "upper!"]);
        assert!(is_layout(dir.path()));
        let mut bytes = Vec::new();
        let layout = Layout::open(dir.path()).unwrap();
        assert_eq!(layout.bytes(), 11);
        layout.write(&mut bytes).unwrap();
        let mut rest = bytes.strip_prefix(MAGIC).unwrap();
        for (number, text) in ["lower", "upper!"].iter().enumerate() {
            let (length, after) = rest.split_at(4);
            let length = u32::from_le_bytes(length.try_into().unwrap()) as usize;
            let header: serde_json::Value = serde_json::from_slice(&after[..length]).unwrap();
            assert_eq!(header["length"], text.len());
            assert_eq!(header["digest"], format!("sha256:{:064x}", 100 + number));
            assert_eq!(header["diff_id"], format!("sha256:{:064x}", 200 + number));
            rest = after[length..].strip_prefix(text.as_bytes()).unwrap();
        }
        assert_eq!(rest, [0; 4]);
    }

    #[test]
    fn a_layout_that_does_not_fit_says_why() {
        let dir = layout("s390x", &["x"]);
        let error = Layout::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("linux/s390x"), "{error}");

        let dir = layout(architecture(), &["x"]);
        fs::write(dir.path().join(format!("blobs/sha256/{:064x}", 100)), "longer").unwrap();
        let error = Layout::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("6 bytes in place of 1"), "{error}");

        fs::write(dir.path().join("index.json"), r#"{"manifests":[{"digest":"sha256:../../x","size":1}]}"#)
            .unwrap();
        let error = Layout::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("not a sha256 digest"), "{error}");
    }
}
