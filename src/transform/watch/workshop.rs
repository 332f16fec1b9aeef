//! From a file to a transform that may go live: read, checked, compiled and tried beside the traffic.

use std::sync::Arc;

use super::super::chain::{Counters, Transform};
use super::super::folder::{self, Content};
use super::super::instance::Instance;
use super::super::loader::{self, Module};
use super::super::settings::Settings;
use super::{Rejected, Watcher, now};

/// From this size on a module is compiled on threads of low priority: it takes many seconds.
const LARGE_BYTES: usize = 1024 * 1024;

/// The priority of those threads: the kernel gives them about a tenth of a busy processor.
const NICE: i32 = 10;

/// Why a file is not usable.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) digest: String,
    pub(super) reason: String,
    pub(super) may_be_unfinished: bool,
}

impl Watcher {
    /// Reads, checks, compiles and tries one file.
    pub(super) fn load(&self, file: &str) -> Result<Arc<Transform>, Refusal> {
        let content = folder::read(&self.dir, file).map_err(|error| Refusal {
            digest: String::new(),
            reason: format!("it could not be read: {error}"),
            may_be_unfinished: true,
        })?;
        self.make(file, content)
    }

    pub(super) fn load_last_good(&self, file: &str) -> Option<Arc<Transform>> {
        let made = self.make(file, self.last_good.get(file)?);
        made.inspect_err(|refusal| {
            tracing::warn!(file, "the copy of its last good version fails too: {}", refusal.reason);
        })
        .ok()
    }

    fn make(&self, file: &str, content: Content) -> Result<Arc<Transform>, Refusal> {
        let digest = loader::digest(&content.module);
        let refuse = |reason: String, may_be_unfinished| Refusal {
            digest: digest.clone(),
            reason,
            may_be_unfinished,
        };
        let text = content.settings.as_deref().unwrap_or("");
        let settings = Settings::parse(text).map_err(|error| {
            refuse(format!("its settings file `{}`: {error}", folder::settings_name(file)), true)
        })?;
        // The same module with other settings need not be compiled again.
        let live = self.live.get(file).filter(|live| live.module.digest == digest);
        let module = match live {
            Some(live) => Arc::clone(&live.module),
            None => {
                let loaded = self.compile(&content.module);
                Arc::new(
                    loaded.map_err(|error| refuse(error.to_string(), error.may_be_unfinished()))?,
                )
            }
        };
        let name: Arc<str> = file.into();
        Instance::start(&self.engine, &name, &module, &settings)
            .map_err(|fault| refuse(format!("it {}", fault.reason), true))?;
        if let Err(error) = self.last_good.keep(&digest, &content.module) {
            tracing::warn!(file, "could not keep a copy of the transform: {error}");
        }
        Ok(Arc::new(Transform {
            file: name,
            module,
            settings,
            settings_text: content.settings,
            counters: Counters::default(),
            since: now(),
        }))
    }

    /// Large modules on threads of low priority, so that the traffic does not feel it.
    fn compile(&self, bytes: &[u8]) -> Result<Module, loader::Error> {
        let compile = || loader::load(&self.engine, bytes, Some(&self.cache));
        if bytes.len() < LARGE_BYTES {
            return compile();
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .thread_name(|_| "transform-compile".into())
            .start_handler(|_| {
                // Without the right to it, the compilation is only less polite.
                rustix::process::setpriority_process(None, NICE).ok();
            })
            .build();
        match pool {
            Ok(pool) => pool.install(compile),
            Err(_) => compile(),
        }
    }

    pub(super) fn reject(&mut self, file: &str, refusal: Refusal) {
        let Refusal { digest, reason, may_be_unfinished: _ } = refusal;
        self.rejected.insert(file.to_owned(), Rejected { digest, reason, since: now() });
    }
}
