//! The blocks inside groups and tasks.

use super::cluster::RESOURCES;
use super::reader::{Content, Entry, Reader, block_of, missing, named};
use crate::job::{
    Access, Effect, JobError, Lifecycle, Logs, Parameterized, Payload, Port, Resources, Setting,
    Target, Template, Volume, VolumeMount,
};

const HOST_NETWORK: &str = "a run has the network of this host";

impl Reader {
    pub fn parameterized(&mut self, entry: &Entry<'_>) -> Result<Parameterized, JobError> {
        let mut parameterized = Parameterized {
            payload: Payload::Optional,
            meta_required: Vec::new(),
            meta_optional: Vec::new(),
            line: entry.line,
        };
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "payload" => {
                    parameterized.payload = match self.string(&entry)?.as_str() {
                        "optional" => Payload::Optional,
                        "required" => Payload::Required,
                        "forbidden" => Payload::Forbidden,
                        other => {
                            return Err(entry.wrong(format!(
                                "`{other}` is not optional, required or forbidden"
                            )));
                        }
                    }
                }
                "meta_required" => parameterized.meta_required = self.list(&entry)?,
                "meta_optional" => parameterized.meta_optional = self.list(&entry)?,
                _ => return Err(entry.unknown("parameterized")),
            }
        }
        Ok(parameterized)
    }

    /// `restart` and `reschedule`: nothing is left out of one that asks for no second attempt.
    pub fn attempts(&mut self, entry: &Entry<'_>, place: &str) -> Result<(), JobError> {
        let (mut attempts, mut unlimited) = (None, None);
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "attempts" => attempts = Some(self.number::<u32>(&entry)?),
                "unlimited" => unlimited = Some(self.flag(&entry)?),
                "interval" | "delay" | "mode" | "delay_function" | "max_delay"
                | "render_templates" => {}
                _ => return Err(entry.unknown(entry.key)),
            }
        }
        let asks_nothing = attempts == Some(0)
            && (entry.key == "restart" || unlimited.is_none_or(|unlimited| !unlimited));
        if !asks_nothing {
            let message = format!(
                "{place}: {} has no effect: a run runs the task once",
                entry.key
            );
            self.note(entry, Effect::None, message);
        }
        Ok(())
    }

    /// The ports, and the mode if it is not the host's.
    pub fn network(
        &mut self,
        entry: &Entry<'_>,
        place: &str,
    ) -> Result<(Vec<Port>, Option<String>), JobError> {
        let (mut ports, mut own) = (Vec::new(), None);
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "mode" => {
                    let mode = self.string(&entry)?;
                    if !matches!(mode.as_str(), "" | "host") {
                        let what = format!("{place}: network mode `{mode}`");
                        self.missing(&entry, "network", &what, HOST_NETWORK);
                        own = Some(mode);
                    }
                }
                "port" => ports.push(self.port(&entry)?),
                "dns" | "hostname" | "cni" => {
                    let what = format!("{place}: {} of the network", entry.key);
                    self.missing(&entry, "network", &what, HOST_NETWORK);
                }
                "mbits" | "device" => self.without_effect(&entry, place),
                _ => return Err(entry.unknown("network")),
            }
        }
        Ok((ports, own))
    }

    fn port(&mut self, entry: &Entry<'_>) -> Result<Port, JobError> {
        let (block, label) = named(entry)?;
        let mut port = Port {
            label,
            fixed: None,
            line: entry.line,
        };
        for entry in self.entries(&block.body) {
            match entry.key {
                "static" => port.fixed = Some(self.number(&entry)?),
                "to" | "host_network" | "ignore_collision" => {}
                _ => return Err(entry.unknown("port")),
            }
        }
        Ok(port)
    }

    /// A service is registered nowhere; a sidecar would change the task's network.
    pub fn service(&mut self, entry: &Entry<'_>, place: &str) -> Result<(), JobError> {
        for inner in self.entries(&block_of(entry)?.body) {
            if inner.key == "connect" {
                let what = format!("{place}: connect of the service");
                self.missing(&inner, "connect", &what, HOST_NETWORK);
            }
        }
        let message = format!("{place}: service has no effect: a run registers and checks none");
        self.note(entry, Effect::None, message);
        Ok(())
    }

    /// Without `env` and `file` no task sees it.
    pub fn identity(&mut self, entry: &Entry<'_>, place: &str) -> Result<(), JobError> {
        for inner in self.entries(&block_of(entry)?.body) {
            if matches!(inner.key, "env" | "file") && self.flag(&inner)? {
                self.is_missing(entry, place, "hand a token over with --env");
            }
        }
        Ok(())
    }

    pub fn volume(&mut self, entry: &Entry<'_>) -> Result<Volume, JobError> {
        let (block, name) = named(entry)?;
        let mut volume = Volume {
            name,
            kind: String::new(),
            source: String::new(),
            access: Access::ReadWrite,
            line: entry.line,
        };
        for entry in self.entries(&block.body) {
            match entry.key {
                "type" => volume.kind = self.string(&entry)?,
                "source" => volume.source = self.string(&entry)?,
                "read_only" => volume.access = self.access(&entry)?,
                "access_mode" | "attachment_mode" | "per_alloc" | "sticky" | "mount_options" => {}
                _ => return Err(entry.unknown("volume")),
            }
        }
        Ok(volume)
    }

    pub fn volume_mount(&mut self, entry: &Entry<'_>) -> Result<VolumeMount, JobError> {
        let mut mount = VolumeMount {
            volume: String::new(),
            destination: String::new(),
            access: Access::ReadWrite,
            propagation: "private".into(),
            selinux_label: String::new(),
            line: entry.line,
        };
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "volume" => mount.volume = self.string(&entry)?,
                "destination" => mount.destination = self.string(&entry)?,
                "read_only" => mount.access = self.access(&entry)?,
                "propagation_mode" => mount.propagation = self.string(&entry)?,
                "selinux_label" => mount.selinux_label = self.string(&entry)?,
                _ => return Err(entry.unknown("volume_mount")),
            }
        }
        for (key, value) in [
            ("volume", &mount.volume),
            ("destination", &mount.destination),
        ] {
            if value.is_empty() {
                return Err(missing(entry.line, "volume_mount", key));
            }
        }
        Ok(mount)
    }

    pub fn lifecycle(&mut self, entry: &Entry<'_>) -> Result<Lifecycle, JobError> {
        let (mut hook, mut sidecar) = (String::new(), false);
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "hook" => hook = self.string(&entry)?,
                "sidecar" => sidecar = self.flag(&entry)?,
                _ => return Err(entry.unknown("lifecycle")),
            }
        }
        if !matches!(hook.as_str(), "prestart" | "poststart" | "poststop") {
            let message = format!("hook `{hook}` is not prestart, poststart or poststop");
            return Err(entry.wrong(message));
        }
        Ok(Lifecycle {
            hook,
            sidecar,
            line: entry.line,
        })
    }

    pub fn payload_file(&mut self, entry: &Entry<'_>) -> Result<Option<Setting>, JobError> {
        let mut file = None;
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "file" => file = Some(self.text(&entry)?),
                _ => return Err(entry.unknown("dispatch_payload")),
            }
        }
        Ok(file)
    }

    pub fn resources(&mut self, entry: &Entry<'_>, place: &str) -> Result<Resources, JobError> {
        let mut resources = Resources::default();
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                "cpu" => resources.cpu_mhz = self.number(&entry)?,
                "cores" => resources.cores = self.number(&entry)?,
                "memory" => resources.memory_mib = self.number(&entry)?,
                "memory_max" => resources.memory_max_mib = self.number(&entry)?,
                _ => self.cluster(&entry, &RESOURCES, place)?,
            }
        }
        Ok(resources)
    }

    pub fn logs(&mut self, entry: &Entry<'_>) -> Result<Logs, JobError> {
        let mut logs = Logs::Collected;
        for entry in self.entries(&block_of(entry)?.body) {
            match entry.key {
                // Rotation is the agent's business, not the driver's.
                "max_files" | "max_file_size" | "enabled" => {}
                "disabled" if self.flag(&entry)? => logs = Logs::Disabled,
                "disabled" => {}
                _ => return Err(entry.unknown("logs")),
            }
        }
        Ok(logs)
    }

    /// A number, or -1 for the agent's own.
    fn owner(&self, entry: &Entry<'_>) -> Result<Option<u32>, JobError> {
        match self.number::<i64>(entry)? {
            -1 => Ok(None),
            number => u32::try_from(number)
                .map(Some)
                .map_err(|_| entry.wrong(format!("{number} is no user or group; give its number"))),
        }
    }

    pub fn template(
        &mut self,
        entry: &Entry<'_>,
        place: &str,
    ) -> Result<Option<Template>, JobError> {
        let mut template = Template {
            data: String::new(),
            destination: String::new(),
            mode: 0o644,
            uid: None,
            gid: None,
            target: Target::File,
            line: entry.line,
        };
        let mut delimiter = "{{".to_owned();
        for entry in self.entries(&block_of(entry)?.body) {
            match (entry.key, &entry.content) {
                ("data", _) => template.data = self.string(&entry)?,
                ("destination", _) => template.destination = self.string(&entry)?,
                ("left_delimiter", _) => delimiter = self.string(&entry)?,
                ("uid", _) => template.uid = self.owner(&entry)?,
                ("gid", _) => template.gid = self.owner(&entry)?,
                ("perms", _) => {
                    let octal = self.string(&entry)?;
                    template.mode = u32::from_str_radix(&octal, 8)
                        .ok()
                        .filter(|mode| *mode <= 0o777)
                        .ok_or_else(|| {
                            entry.wrong(format!("`{octal}` is no octal mode up to 777"))
                        })?;
                }
                ("env", Content::Attribute(_)) => {
                    if self.flag(&entry)? {
                        template.target = Target::Environment;
                    }
                }
                ("source", _) => {
                    let what = format!("{place}: source of a template");
                    self.missing(&entry, "template", &what, "give its text as `data`");
                    return Ok(None);
                }
                // What happens when a text changes: this one does not change.
                (
                    "change_mode"
                    | "change_signal"
                    | "change_script"
                    | "splay"
                    | "wait"
                    | "error_on_missing_key"
                    | "right_delimiter"
                    | "vault_grace"
                    | "once",
                    _,
                ) => {}
                _ => return Err(entry.unknown("template")),
            }
        }
        if !delimiter.is_empty() && template.data.contains(&delimiter) {
            let what = format!(
                "{place}: template `{}` with `{delimiter}` in its text",
                template.destination
            );
            self.missing(entry, "template", &what, "write the text out");
            return Ok(None);
        }
        Ok(Some(template))
    }
}
