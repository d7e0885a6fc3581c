# Java compiles a file of the job and runs it. The virtual machine sizes its heap by the task's memory, its threads by its cpu.
job "java" {
  type = "batch"

  group "java" {
    task "java" {
      driver = "exec2"

      config {
        command = "java"
        args    = ["local/Limits.java"]
        unveil = [
          "r:/etc/java-21-openjdk", # /usr/lib/jvm links into it
        ]
      }

      template {
        destination = "local/Limits.java"
        data        = <<-EOT
          class Limits {
            public static void main(String[] args) {
              Runtime runtime = Runtime.getRuntime();
              System.out.println("processors " + runtime.availableProcessors());
              System.out.println("heap MiB " + (runtime.maxMemory() >> 20));
            }
          }
        EOT
      }

      resources {
        cpu    = 1000
        memory = 512
      }
    }
  }
}
