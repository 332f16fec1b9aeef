//! What `transforms test` and `bench` are given: modules with their settings, and messages.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;

use super::super::client::{Client, ProcessArguments};
use super::super::messages::failed_ids;
use super::super::output::to_stderr;
use super::super::{Global, UsageError};
use crate::case::{self, Sample};
use crate::transform::{Chain, ModuleFiles, Workbench, read_modules};

/// From this size on a module takes seconds to compile, which is worth a word.
const LARGE_BYTES: usize = 1024 * 1024;

#[derive(Debug, Args)]
pub(super) struct ModuleArguments {
    /// The modules, in the order of the chain; or a folder of them.
    #[arg(value_name = "FILE.wasm", required = true)]
    modules: Vec<PathBuf>,
    /// A module's settings, instead of the `.toml` file beside it; with several modules, once for
    /// each in their order.
    #[arg(long, value_name = "FILE.toml")]
    settings: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct MessageArguments {
    /// Messages to work on, instead of the built-in ones: cases of `messages export`, lines of
    /// `tail --json`, or messages as JSON; give it again for more.
    #[arg(long, visible_alias = "case", value_name = "FILE", conflicts_with = "parked")]
    messages: Vec<PathBuf>,
    /// Work on the failed messages of the running process.
    #[arg(long)]
    parked: bool,
    /// The most messages to take from the running process.
    #[arg(long, value_name = "N", default_value = "100", requires = "parked")]
    limit: usize,
    #[command(flatten)]
    process: ProcessArguments,
}

impl MessageArguments {
    /// Whether the messages are those of this program.
    pub(super) fn are_built_in(&self) -> bool {
        self.messages.is_empty() && !self.parked
    }

    /// Nothing where there are none to be given: see [`Self::are_built_in`].
    pub(super) async fn read(&self, global: &Global) -> anyhow::Result<Vec<Sample>> {
        if self.parked {
            return self.parked(&global.config).await;
        }
        let mut samples = Vec::new();
        for path in &self.messages {
            let text = read_text(path)?;
            let read = case::read(&text)
                .with_context(|| format!("{} is no file of messages", path.display()))?;
            for mut sample in read {
                if samples.iter().any(|known: &Sample| known.name == sample.name) {
                    sample.name = format!("{} of {}", sample.name, path.display());
                }
                samples.push(sample);
            }
        }
        Ok(samples)
    }

    async fn parked(&self, config: &Path) -> anyhow::Result<Vec<Sample>> {
        let client = Client::new(&self.process, config)?;
        let mut samples = Vec::new();
        for id in failed_ids(&client, self.limit).await? {
            let case = client.get(&["messages", &id, "case"], &[]).await?;
            let read = case::read(&case.to_string());
            samples.extend(read.with_context(|| format!("message {id} cannot be read"))?);
        }
        if samples.is_empty() {
            anyhow::bail!("the running sluicebox has no failed messages");
        }
        Ok(samples)
    }
}

/// Text that is read whole.
pub(super) fn read_text(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| UsageError(format!("could not read {}: {error}", path.display())).into())
}

/// The modules as a chain, and what runs it. Cases bring settings for modules that have none.
pub(super) fn load(
    arguments: &ModuleArguments,
    samples: &[Sample],
) -> anyhow::Result<(Workbench, Arc<Chain>)> {
    let mut modules = Vec::new();
    for path in &arguments.modules {
        let read = read_modules(path)
            .map_err(|error| UsageError(format!("could not read {}: {error}", path.display())))?;
        if read.is_empty() {
            return Err(UsageError(format!("{} has no modules", path.display())).into());
        }
        modules.extend(read);
    }
    if !arguments.settings.is_empty() && arguments.settings.len() != modules.len() {
        let (settings, modules) = (arguments.settings.len(), modules.len());
        let text = format!("--settings is given {settings} times for {modules} modules");
        return Err(UsageError(text).into());
    }
    for (module, settings) in modules.iter_mut().zip(&arguments.settings) {
        module.settings = Some(read_text(settings)?);
    }
    for module in &mut modules {
        take_from_cases(module, samples);
        if module.module.len() >= LARGE_BYTES {
            to_stderr(&format!("compiling {}, which is kept for the next time …", module.file));
        }
    }
    let workbench = Workbench::of_user()?;
    let chain = workbench.chain(modules)?;
    Ok((workbench, chain))
}

/// The settings that the module had where the message failed, and a word where it is another one.
fn take_from_cases(module: &mut ModuleFiles, samples: &[Sample]) {
    let digest = module.digest();
    let transforms = samples
        .iter()
        .filter_map(|sample| sample.case.as_deref())
        .flat_map(|case| case.transforms.iter());
    let named: Vec<_> = transforms
        .filter(|transform| transform.file == module.file || transform.digest == digest)
        .collect();
    if let Some(other) = named.iter().find(|transform| transform.digest != digest) {
        let live = other.digest.get(..16).unwrap_or(&other.digest);
        let file = &module.file;
        to_stderr(&format!("note: {file} is not the module that was live at the export ({live})"));
    }
    if module.settings.is_none()
        && let Some(settings) = named.iter().find_map(|transform| transform.settings.clone())
    {
        to_stderr(&format!("note: {} has the settings of the case", module.file));
        module.settings = Some(settings);
    }
}
