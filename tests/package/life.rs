//! How the packages come and go, beside what they find.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::machine::{Kind, Machine};
use crate::{DRIVER, LINK, NAME, Packages, VERSION};

/// A test of its own for each, as a machine lasts as long as its thread.
macro_rules! on_both {
    ($($behaviour:ident)*) => {
        mod deb { $(#[test] fn $behaviour() { super::$behaviour(super::Kind::Deb); })* }
        mod rpm { $(#[test] fn $behaviour() { super::$behaviour(super::Kind::Rpm); })* }
    };
}

on_both! {
    it_comes_and_goes_and_nomads_directory_stays_as_it_was
    on_a_host_without_nomad_nothing_of_it_stays
    what_others_put_beside_it_stays
    links_to_where_nomads_data_is_stay
    it_takes_the_place_of_hashicorps_package_for_good
    hashicorps_package_comes_back
    a_link_to_elsewhere_becomes_ours
    a_copied_driver_in_the_links_place_becomes_ours
    a_directory_in_the_links_place_is_an_error_that_names_it
}

fn it_comes_and_goes_and_nomads_directory_stays_as_it_was(kind: Kind) {
    let machine = Machine::new(kind);
    machine.make_data_dir();
    let steps = [
        (Packages::built(), VERSION),
        (Packages::next().clone(), "99.0.0"),
        (Packages::built(), VERSION),
        (Packages::built(), VERSION),
    ];
    for (packages, version) in steps {
        machine.install(&packages);
        assert_eq!(machine.installed(NAME), Some(format!("{version}-1")));
        machine.expect_link();
        machine.expect_data_dir();
        assert_eq!(machine.changed(NAME), "");
        // As `systemctl help` of a scope asks for it.
        let page = machine.sh("man -w 8 nomad-driver-exec2");
        let page = String::from_utf8_lossy(&page.stdout).into_owned();
        assert!(
            page.starts_with("/usr/share/man/man8/nomad-driver-exec2.8"),
            "{page}"
        );
    }
    machine.remove(NAME);
    for gone in [LINK, DRIVER, "/usr/lib/systemd/system/exec2.slice"] {
        assert!(
            fs::symlink_metadata(machine.path(gone)).is_err(),
            "{gone} is left"
        );
    }
    machine.expect_data_dir();
    machine.purge(NAME);
    machine.expect_data_dir();
    assert_eq!(machine.installed(NAME), None);
}

fn on_a_host_without_nomad_nothing_of_it_stays(kind: Kind) {
    let machine = Machine::new(kind);
    for packages in [&Packages::built(), Packages::next()] {
        machine.install(packages);
        machine.expect_link();
    }
    machine.remove(NAME);
    machine.purge(NAME);
    assert!(!machine.path("/opt/nomad").exists());
    let left =
        machine.sh("find /etc /opt /usr /var -xdev -name '*driver-exec2*' -o -name 'exec2*.slice'");
    assert_eq!(String::from_utf8_lossy(&left.stdout), "");
}

/// An operator's other plugin, and what a killed `run` leaves.
fn what_others_put_beside_it_stays(kind: Kind) {
    let machine = Machine::new(kind);
    let others = [
        "/opt/nomad/data/plugins/another-driver",
        "/var/lib/nomad-driver-exec2/run/alloc/left",
    ];
    machine.install(&Packages::built());
    for path in others {
        fs::write(machine.path(path), "another's").unwrap();
    }
    machine.install(Packages::next());
    machine.remove(NAME);
    machine.purge(NAME);
    assert_eq!(machine.link(), None);
    for path in others {
        assert!(machine.path(path).exists(), "{path}");
    }
    assert!(
        !machine
            .path("/var/lib/nomad-driver-exec2/run/alloc_mounts")
            .exists()
    );
}

/// Package managers remove a link to a directory of a package with the package.
fn links_to_where_nomads_data_is_stay(kind: Kind) {
    for dir in ["/opt/nomad", "/opt/nomad/data", "/opt/nomad/data/plugins"] {
        for is_used in [true, false] {
            let machine = Machine::new(kind);
            let elsewhere = machine.path("/srv/elsewhere");
            fs::create_dir_all(&elsewhere).unwrap();
            if is_used {
                fs::write(elsewhere.join("state"), "Nomad's").unwrap();
            }
            fs::create_dir_all(machine.path(dir).parent().unwrap()).unwrap();
            symlink("/srv/elsewhere", machine.path(dir)).unwrap();
            machine.install(&Packages::built());
            let shown = machine.sh(&format!("readlink -f {LINK}"));
            assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), DRIVER);
            machine.install(Packages::next());
            machine.remove(NAME);
            machine.purge(NAME);
            let kept = fs::read_link(machine.path(dir)).unwrap();
            assert_eq!(kept, Path::new("/srv/elsewhere"), "{dir}");
            let left = machine.sh("find /srv/elsewhere -mindepth 1");
            let expected = if is_used {
                "/srv/elsewhere/state\n"
            } else {
                ""
            };
            assert_eq!(String::from_utf8_lossy(&left.stdout), expected, "{dir}");
        }
    }
}

fn it_takes_the_place_of_hashicorps_package_for_good(kind: Kind) {
    let machine = Machine::new(kind);
    machine.install_theirs();
    machine.install(&Packages::built());
    assert_eq!(machine.installed("nomad-driver-exec2"), None);
    machine.expect_link();
    machine.purge("nomad-driver-exec2");
    machine.expect_link();
    machine.install(Packages::next());
    machine.expect_link();
}

/// Ours goes first: theirs does not say that it takes the place of another.
fn hashicorps_package_comes_back(kind: Kind) {
    let machine = Machine::new(kind);
    machine.install_theirs();
    machine.install(&Packages::built());
    machine.remove(NAME);
    assert_eq!(machine.link(), None);
    machine.sh("rm -rf /theirs");
    machine.install_theirs();
    machine.expect_link();
    assert_eq!(
        fs::read_to_string(machine.path(DRIVER)).unwrap(),
        "theirs\n"
    );
}

fn a_link_to_elsewhere_becomes_ours(kind: Kind) {
    let machine = Machine::new(kind);
    machine.link_to("/srv/nomad-driver-exec2");
    machine.install(&Packages::built());
    machine.expect_link();
}

fn a_copied_driver_in_the_links_place_becomes_ours(kind: Kind) {
    let machine = Machine::new(kind);
    machine.make_data_dir();
    fs::create_dir(machine.path(LINK).parent().unwrap()).unwrap();
    fs::write(machine.path(LINK), "copied by hand").unwrap();
    machine.install(&Packages::built());
    machine.expect_link();
    machine.expect_data_dir();
}

fn a_directory_in_the_links_place_is_an_error_that_names_it(kind: Kind) {
    let machine = Machine::new(kind);
    fs::create_dir_all(machine.path(LINK).join("kept")).unwrap();
    let output = machine.try_install(&Packages::built());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && told.contains(LINK),
        "{output:?}"
    );
    assert!(machine.path(LINK).join("kept").is_dir());
    // Once it is out of the way the same command succeeds.
    fs::remove_dir_all(machine.path(LINK)).unwrap();
    machine.install(&Packages::built());
    machine.expect_link();
}

#[test]
fn a_diverted_link_is_the_operators() {
    let machine = Machine::new(Kind::Deb);
    let diverted = "/opt/nomad/data/nomad-driver-exec2.of-the-package";
    machine.link_to("/srv/of-the-operator");
    let divert = format!("dpkg-divert --local --no-rename --divert {diverted} --add {LINK}");
    assert!(machine.sh(&divert).status.success());
    machine.install(&Packages::built());
    assert_eq!(
        machine.link().as_deref(),
        Some(Path::new("/srv/of-the-operator"))
    );
    assert_eq!(
        fs::read_link(machine.path(diverted)).unwrap(),
        Path::new(DRIVER)
    );
}

/// A package of theirs that was removed long before ours came: its purge comes last.
#[test]
fn a_late_purge_of_hashicorps_package_leaves_the_link() {
    let machine = Machine::new(Kind::Deb);
    machine.install_theirs();
    machine.remove("nomad-driver-exec2");
    machine.install(&Packages::built());
    machine.expect_link();
    machine.purge("nomad-driver-exec2");
    machine.expect_link();
}
