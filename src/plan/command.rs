//! Where a task's command is looked for.

/// Where a bare name is looked for if the task's environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// limits.h.
const NAME_MAX_BYTES: usize = 255;

/// Where a command that is a bare name is looked for.
pub fn search_path<'a>(command: &str, env: &'a [(String, String)]) -> Option<&'a str> {
    let path = env.iter().rev().find(|(key, _)| key == "PATH");
    let path = path.map_or(DEFAULT_PATH, |(_, value)| value);
    (!command.contains('/')).then_some(path)
}

/// What is tried as the command, in order.
pub fn candidates(command: &str, env: &[(String, String)]) -> Vec<String> {
    match search_path(command, env) {
        None => vec![command.to_owned()],
        // No file has such a name, and as many long strings as PATH has entries would be made of it.
        Some(_) if command.len() > NAME_MAX_BYTES => Vec::new(),
        // An empty entry means the working directory, where a task writes: it is not searched.
        Some(path) => path
            .split(':')
            .filter(|directory| !directory.is_empty())
            .map(|directory| format!("{directory}/{command}"))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_file_can_have_is_looked_for_nowhere() {
        let env = [("PATH".to_owned(), "/a::/b".to_owned())];
        assert_eq!(candidates("x", &env), ["/a/x", "/b/x"]);
        assert_eq!(candidates(&"x".repeat(255), &env).len(), 2);
        assert!(candidates(&"x".repeat(256), &env).is_empty());
        let path = format!("/{}", "x".repeat(256));
        assert_eq!(candidates(&path, &env), std::slice::from_ref(&path));
    }
}
