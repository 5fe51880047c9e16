//! Manual pages and completions from the definition of a command line, with what their generators leave out. For the
//! examples that write them.

use std::fs;
use std::io;
use std::path::Path;

use clap::builder::Resettable;
use clap::{Arg, Command};
use clap_complete::Shell;
use clap_mangen::Man;

/// Writes the page of a command, which is part of this release, and those of the commands below it.
pub(crate) fn pages(command: Command, release: &str, directory: &Path) -> io::Result<()> {
    let mut command = named(command).disable_help_subcommand(true);
    command.build();
    page(&command, release, directory)
}

/// The generator knows no version of the commands below.
fn page(command: &Command, release: &str, directory: &Path) -> io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        page(below, release, directory)?;
    }
    Man::new(command.clone()).source(release).generate_to(directory)?;
    Ok(())
}

/// Writes the completions of a command for bash, zsh and fish.
pub(crate) fn completions(command: Command, name: &str, directory: &Path) -> io::Result<()> {
    let mut command = named(command);
    for shell in [Shell::Bash, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command, name, directory)?;
    }
    let path = clap_complete::generate_to(Shell::Fish, &mut command, name, directory)?;
    fs::write(&path, with_values_in_fish(&fs::read_to_string(&path)?))
}

/// Gives options that only have an alias this as their name: the generators pass over aliases of an option without a long name.
fn named(command: Command) -> Command {
    let named_option = |option: Arg| match option.get_visible_aliases().as_deref() {
        Some(&[alias]) if option.get_long().is_none() => {
            let name: &'static str = alias.to_owned().leak();
            option.visible_alias(Resettable::Reset).long(name)
        }
        _ => option,
    };
    command.mut_args(named_option).mut_subcommands(named)
}

/// While the value of an option is asked for, the command line lacks it, and fish's argparse fails. Then, all but that option
/// is parsed.
fn with_values_in_fish(script: &str) -> String {
    let (before, after) =
        script.split_once("2>/dev/null\n    or return\n").expect("the function that parses the command line");
    let parse = before.lines().last().expect("the line that parses").trim();
    let without_last = parse.replace("$cmd", "$cmd[1..-2]");
    format!("{before}2>/dev/null\n    or {without_last} 2>/dev/null\n    or return\n{after}")
}
