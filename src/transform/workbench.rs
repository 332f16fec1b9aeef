//! Modules that a user names, outside of a transforms folder: what `transforms test`, `bench` and
//! `inspect` work with.
//!
//! Nothing is done here in a way of its own. Loader, settings, instances and runner are those of a
//! running pipeline, so that what holds here holds there.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::cache::Cache;
use super::chain::{Chain, Counters, Transform};
use super::compiler::Compiler;
use super::engine::Engine;
use super::folder;
use super::instance::Instance;
use super::loader;
use super::runner::Runner;
use super::settings::Settings;

/// A module's files, read.
#[derive(Clone)]
pub struct ModuleFiles {
    /// The file's name; the chain's order is that of the list, not of the names.
    pub file: String,
    pub module: Vec<u8>,
    /// The text of its settings file; nothing where there is none.
    pub settings: Option<String>,
}

impl std::fmt::Debug for ModuleFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModuleFiles").field("file", &self.file).finish_non_exhaustive()
    }
}

impl ModuleFiles {
    /// SHA-256 of the module, in hexadecimal.
    #[must_use]
    pub fn digest(&self) -> String {
        loader::digest(&self.module)
    }
}

/// Reads a module and the settings file beside it, or all modules of a folder in the order of a
/// chain.
///
/// # Errors
///
/// When a file cannot be read.
pub fn read_modules(path: &Path) -> io::Result<Vec<ModuleFiles>> {
    let read = |dir: &Path, file: &str| {
        let folder::Content { module, settings } = folder::read(dir, file)?;
        Ok(ModuleFiles { file: file.to_owned(), module, settings })
    };
    if path.is_dir() {
        return folder::look(path)?.modules.keys().map(|file| read(path, file)).collect();
    }
    let file = path.file_name().and_then(|name| name.to_str());
    let file = file.ok_or_else(|| io::Error::other("its name is not UTF-8 text"))?;
    let dir = path.parent().unwrap_or(Path::new(""));
    Ok(vec![read(dir, file)?])
}

/// Why a module cannot be used, in the words that `transforms list` has for it.
#[derive(Debug, thiserror::Error)]
#[error("`{file}`: {reason}")]
pub struct Refused {
    pub file: String,
    pub reason: String,
}

/// The engine, and compiled code from earlier times.
#[derive(Debug)]
pub struct Workbench {
    engine: Arc<Engine>,
    compiler: Compiler,
    cache: Option<Cache>,
}

/// The machine cannot run WebAssembly.
#[derive(Debug, thiserror::Error)]
#[error("could not start the WebAssembly engine: {reason}")]
pub struct Unsupported {
    reason: String,
}

impl Workbench {
    /// `cache_dir` keeps compiled code, so that a large module is compiled once. A folder that cannot
    /// be used costs only time.
    ///
    /// # Errors
    ///
    /// When wasmtime does not support this machine.
    pub fn new(cache_dir: Option<&Path>) -> Result<Self, Unsupported> {
        let engine =
            Engine::new().map_err(|error| Unsupported { reason: loader::chain(&error) })?;
        let cache = cache_dir.and_then(|dir| {
            Cache::open(dir)
                .inspect_err(|error| {
                    tracing::debug!(dir = %dir.display(), %error, "compiled code is not kept");
                })
                .ok()
        });
        Ok(Self { engine: Arc::new(engine), compiler: Compiler::Here, cache })
    }

    /// As the commands have it: with the code that this user's earlier commands compiled, and reading files
    /// in a process of its own, which has to be this program.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn of_user() -> Result<Self, Unsupported> {
        Ok(Self { compiler: Compiler::apart(), ..Self::new(user_cache_dir().as_deref())? })
    }

    fn load(&self, bytes: &[u8]) -> Result<loader::Module, loader::Error> {
        loader::load_by(&self.compiler, &self.engine, bytes, self.cache.as_ref())
    }

    /// Loads modules as a chain, in the order in which they are given. Each is compiled, started and
    /// given its settings, as before it would go live.
    ///
    /// # Errors
    ///
    /// Why the first that cannot be used would be rejected.
    pub fn chain(&self, modules: Vec<ModuleFiles>) -> Result<Arc<Chain>, Refused> {
        let transforms = modules.into_iter().map(|files| self.transform(files));
        Ok(Arc::new(Chain::new(1, transforms.collect::<Result<_, _>>()?)))
    }

    /// What runs this workbench's chains.
    #[must_use]
    pub fn runner(&self) -> Runner {
        Runner::new(Arc::clone(&self.engine))
    }

    /// The same for messages that are only tried: nothing is counted, and nothing is logged as if it
    /// had happened.
    #[must_use]
    pub fn quiet_runner(&self) -> Runner {
        Runner::quiet(Arc::clone(&self.engine))
    }

    /// What the bytes are, and whether they would be loaded.
    #[must_use]
    pub fn inspect(&self, bytes: &[u8]) -> super::inspect::Inspection {
        super::inspect::inspect(bytes, self.load(bytes).err().as_ref())
    }

    fn transform(&self, files: ModuleFiles) -> Result<Arc<Transform>, Refused> {
        let refuse = |reason: String| Refused { file: files.file.clone(), reason };
        let text = files.settings.as_deref().unwrap_or("");
        let of_settings = |error| refuse(format!("its settings file: {error}"));
        Settings::parse(text).map_err(of_settings)?;
        let module = self.load(&files.module).map_err(|error| refuse(error.to_string()))?;
        let settings = Settings::of(text, module.schema.as_ref()).map_err(of_settings)?;
        let file: Arc<str> = files.file.as_str().into();
        Instance::start(&self.engine, &file, &module, &settings, false)
            .map_err(|fault| refuse(format!("it {}", fault.reason)))?;
        Ok(Arc::new(Transform {
            file,
            module: Arc::new(module),
            settings,
            settings_text: files.settings,
            counters: Counters::default(),
            since: String::new(),
        }))
    }
}

/// Where the compiled code of this user's modules is kept between two commands: `sluicebox` in
/// `$XDG_CACHE_HOME` or `~/.cache`. Nothing where neither is known.
#[must_use]
pub fn user_cache_dir() -> Option<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(base.join("sluicebox"))
}
